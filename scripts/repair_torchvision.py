"""Make a CPU torch and a CUDA build of torchvision live together, in this environment only.

    python scripts/repair_torchvision.py

Package indexes ship torchvision for Linux as a CUDA build. Beside a CPU torch its compiled part does not load, and
then `import torchvision` dies with "operator torchvision::nms does not exist", and with it timm, evaluate, the models
of transformers and the `accelerate` command. Nothing of them calls that operator; only its declaration is missing.
Where, and only where, that is the case, this script puts a start-up hook into the environment's site-packages that
declares it just before torchvision is first imported. It steps aside as soon as torchvision's compiled part loads.
To undo: delete the two files that it names.
"""

import subprocess
import sys
import sysconfig
from pathlib import Path

HOOK = '''"""Declares the operators of a torchvision whose compiled part does not load beside a CPU torch."""

import importlib.machinery
import os
import sys


class _DeclareOperators:
    library = None  # on the class: the finder itself is gone after its one import, and a library that is
    # garbage-collected takes its operators with it

    def find_spec(self, name, path=None, target=None):
        if name != "torchvision":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name)
        if spec is None or spec.origin is None:
            return None
        import torch

        try:
            torch.ops.load_library(os.path.join(os.path.dirname(spec.origin), "_C.so"))
        except OSError:
            type(self).library = torch.library.Library("torchvision", "FRAGMENT")
            for operator in ("nms", "qnms"):
                type(self).library.define(operator + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return None


sys.meta_path.insert(0, _DeclareOperators())
'''
MODULE_NAME = "_declare_torchvision_operators"


def import_error(code: str) -> str:
    """Run `code` in a fresh interpreter; return the last line of its error, or "" if it ran."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    return "" if result.returncode == 0 else (result.stderr.strip().splitlines() or ["killed"])[-1]


def main() -> None:
    """Detect the mismatch, repair it, and prove the repair; exit 1 if torchvision still fails."""
    error = import_error("import torchvision")
    if not error:
        print("torchvision imports; nothing to repair")
        return
    if "torchvision::nms does not exist" not in error or import_error("import torch; assert not torch.version.cuda"):
        sys.exit(f"torchvision does not import, and not for the reason known here: {error}")
    site_packages = Path(sysconfig.get_paths()["purelib"])
    files = [site_packages / f"{MODULE_NAME}.py", site_packages / f"{MODULE_NAME}.pth"]
    files[0].write_text(HOOK)
    files[1].write_text(f"import {MODULE_NAME}\n")
    if error := import_error("import torchvision"):
        for file in files:
            file.unlink()
        sys.exit(f"the repair did not help and was taken back: {error}")
    print("torchvision is a CUDA build beside a CPU torch; repaired by", *files)


if __name__ == "__main__":
    main()
