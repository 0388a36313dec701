"""Fig. 7: k = 80 rows for 100 coordinates, full batches. At depth 10 sign descent finds the sparse truth.

8 draws of the data, where the paper shows one.
"""

import regression
from paper import settings

DEPTHS = (1, 2, 3, 10)


def main() -> None:
    asked = settings(__doc__)
    result = regression.simulate(asked, 80, DEPTHS, seeds=8)
    asked.save(regression.draw(result, DEPTHS, "Fig. 7: k = 80, n = 100, full batches"), "figure_7")
    asked.write(regression.table(result, DEPTHS), "figure_7")


if __name__ == "__main__":
    main()
