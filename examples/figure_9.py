"""Fig. 9: k = 40 rows for 100 coordinates, full batches: too few for any depth to find the truth.

8 draws of the data, where the paper shows one.
"""

import regression
from paper import settings

DEPTHS = (1, 2, 3, 10)


def main() -> None:
    asked = settings(__doc__)
    result = regression.simulate(asked, 40, DEPTHS, seeds=8)
    asked.save(regression.draw(result, DEPTHS, "Fig. 9: k = 40, n = 100, full batches"), "figure_9")
    asked.write(regression.table(result, DEPTHS), "figure_9")


if __name__ == "__main__":
    main()
