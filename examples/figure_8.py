"""Fig. 8: k = 80 rows for 100 coordinates, batches of 5.

8 draws of the data, where the paper shows one.
"""

import regression

if __name__ == "__main__":
    regression.main(__doc__, 8, k=80, batch_size=5)
