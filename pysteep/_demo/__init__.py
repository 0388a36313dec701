"""`python -m pysteep demo`."""
