"""Fig. 8: k = 80 rows for 100 coordinates, batches of 5.

8 draws of the data, where the paper shows one.
"""

import regression
from paper import settings

DEPTHS = (1, 2, 3, 10)


def main() -> None:
    asked = settings(__doc__)
    result = regression.simulate(asked, 80, DEPTHS, seeds=8, batch_size=5)
    asked.save(regression.draw(result, DEPTHS, "Fig. 8: k = 80, n = 100, batches of 5"), "figure_8")
    asked.write(regression.table(result, DEPTHS), "figure_8")


if __name__ == "__main__":
    main()
