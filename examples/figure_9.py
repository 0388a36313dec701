"""Fig. 9: k = 40 rows for 100 coordinates, full batches: too few for any depth to find the truth.

8 draws of the data, where the paper shows one.
"""

import regression

if __name__ == "__main__":
    regression.main(__doc__, 9, k=40, batch_size=None)
