"""Fig. 7: k = 80 rows for 100 coordinates, full batches. At depth 10 sign descent finds the sparse truth.

8 draws of the data, where the paper shows one.
"""

import regression

if __name__ == "__main__":
    regression.main(__doc__, 7, k=80, batch_size=None)
