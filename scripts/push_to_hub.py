"""Send a finished output folder to the Hub: a network, an ensemble or a dataset of pseudo-labels.

    python scripts/push_to_hub.py runs/stage2_b5 user/name --private
    python scripts/push_to_hub.py runs/stage2_b5/best user/name --revision best
    python scripts/push_to_hub.py runs/labels user/labels

First the folder is checked: every file is there, weights open, classes are ours, a dataset is what its manifest says.
Checkpoints, the tracker's files and `best/` stay here. A folder without a card gets one. Log in with `hf auth login`,
or set HF_TOKEN.
"""

import argparse
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

from hf_seg.errors import UserError, one_line_errors
from hf_seg.hub.cards import write_model_card
from hf_seg.hub.push import check_login, find_kind, push


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what a recipe left in its --output_dir")
    parser.add_argument("repository", help="user/name on the Hub; made if it is new")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--revision", help="branch, made if it is new; without it, main")
    parser.add_argument("--dataset", action="store_true", help="refuse a folder that is no dataset")
    return parser.parse_args()


def main() -> None:
    """Check, complete, send."""
    args = parse()
    disable_progress_bar()
    kind = find_kind(args.folder)
    if args.dataset and kind != "dataset":
        raise UserError(f"{args.folder} holds no dataset but {'an' if kind == 'ensemble' else 'a'} {kind}")
    check_login(args.repository)
    if kind != "dataset" and not (args.folder / "README.md").exists():
        write_model_card(args.folder)
        print(f"card: {args.folder / 'README.md'}")
    print(f"on the Hub: {push(args.folder, args.repository, args.private, args.revision)}")


if __name__ == "__main__":
    with one_line_errors():
        main()
