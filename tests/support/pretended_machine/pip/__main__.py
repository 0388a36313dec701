"""`pip install` without a build: the real one looks at the options, and the package as it is here is copied."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

trouble = os.environ.get("PRETENDED_TROUBLE")
if trouble == "slow":
    time.sleep(1000)
options = sys.argv[1:]
real = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
python = [sys.executable, "-P"]
nothing = ["-r", os.devnull, *(["--no-such-option"] if trouble else [])]
done = subprocess.run([*python, "-m", "pip", *options[: options.index(".")], *nothing], env=real, check=False)
if done.returncode:
    sys.exit(done.returncode)
target = Path(options[options.index("--target") + 1]) / "pysteep"
shutil.copytree("pysteep", target, dirs_exist_ok=True, ignore=lambda folder, _: ["kernels"] if folder == "pysteep" else [])
shutil.copytree("kernels", target / "kernels", dirs_exist_ok=True)
where = [*python, "-c", "import pysteep._csrc as csrc; print(csrc.__file__)"]
shutil.copy(subprocess.run(where, env=real, check=True, capture_output=True, text=True).stdout.strip(), target)
