"""The paper's figures, tables and deep networks, each as the command line runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

image = pytest.importorskip("matplotlib.image")
FOLDER = Path(__file__).parents[2] / "examples"
EXAMPLES = sorted(path for path in FOLDER.glob("*.py") if 'if __name__ == "__main__":' in path.read_text())
DEEP = {"finetune_bert", "finetune_spectrum", "qk_balance", "sparse_resnet"}


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_quick(example, tmp_path):
    """A picture that is not blank and a table, within a minute or, of a deep network, three."""
    command = [sys.executable, str(example), "--quick", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180 if example.stem in DEEP else 60)
    assert done.returncode == 0, done.stderr
    picture = image.imread(tmp_path / f"{example.stem}.png")
    assert min(picture.shape[:2]) > 300
    assert picture[..., :3].std() > 0.02
    lines = (tmp_path / f"{example.stem}.md").read_text().splitlines()
    assert lines[0].startswith("| ")
    assert lines[1].startswith("|---")
    assert len(lines) > 4
    assert "nan" not in "".join(lines)


def test_every_figure_and_table_is_there():
    names = {path.stem for path in EXAMPLES}
    figures = {f"figure_{n}" for n in ("1", "2", "3", "4_6", "7", "8", "9", "10")}
    assert names == figures | {"table_1", "table_4"} | DEEP
