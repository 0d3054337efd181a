"""Make a CPU torch and a CUDA build of torchvision work together, in this environment only.

    python scripts/repair_torchvision.py

Package indexes ship torchvision for Linux as a CUDA build. With a CPU torch its compiled part does not load, and
`import torchvision` fails with "operator torchvision::nms does not exist". So do timm, evaluate, the models of
transformers and the `accelerate` command, although none of them calls that operator; only its declaration is missing.
In this case, and in no other, the script installs a start-up hook in the environment's site-packages that declares the
operator just before torchvision is first imported. The hook does nothing once torchvision's compiled part loads.
To undo the repair, delete the two files that the script names.
"""

import argparse
import subprocess
import sys
import sysconfig
from pathlib import Path

HOOK = '''"""Declares the operators of a torchvision whose compiled part does not load with a CPU torch."""

import importlib.machinery
import os
import sys


class _DeclareOperators:
    library = None  # kept on the class: the operators of a garbage-collected library are removed with it

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
    """Detect the mismatch, repair it, and check the repair; exit 1 if torchvision still fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    unknown = parser.parse_known_args()[1]
    if unknown:  # argparse would print its usage too
        print(f"error: unknown argument {unknown[0]!r}; the script takes none", file=sys.stderr)
        sys.exit(2)
    error = import_error("import torchvision")
    if not error:
        print("torchvision imports; nothing to repair")
        return
    if "torchvision::nms does not exist" not in error or import_error("import torch; assert not torch.version.cuda"):
        sys.exit(f"error: torchvision does not import, for a reason that this script cannot repair: {error}")
    site_packages = Path(sysconfig.get_paths()["purelib"])
    files = [site_packages / f"{MODULE_NAME}.py", site_packages / f"{MODULE_NAME}.pth"]
    try:
        files[0].write_text(HOOK)
        files[1].write_text(f"import {MODULE_NAME}\n")
    except OSError as error:
        sys.exit(f"error: {error.filename} cannot be written ({error.strerror}); use an environment of your own")
    if error := import_error("import torchvision"):
        for file in files:
            file.unlink()
        sys.exit(f"error: the repair did not help and was undone: {error}")
    print("torchvision is a CUDA build with a CPU torch; repaired by", *files)


if __name__ == "__main__":
    main()
