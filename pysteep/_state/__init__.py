"""What an optimizer remembers between its steps: factors, balances, roundings, shards, and who wrote to a parameter."""
