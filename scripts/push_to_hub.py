"""Send a finished output folder to the Hub: a network, an ensemble or a dataset of pseudo-labels.

    python scripts/push_to_hub.py runs/stage2_b5 user/name --private
    python scripts/push_to_hub.py runs/stage2_b5/best user/name --revision best
    python scripts/push_to_hub.py runs/labels user/labels

First the folder is checked: every file exists, weights open, class 0 is background, the files of a dataset have the
checksums in its manifest. Checkpoints, the tracker's files and `best/` are not sent. A folder without a card gets one.
Log in with `hf auth login`, or set HF_TOKEN.
"""

import argparse
from pathlib import Path

from hf_seg.errors import UserError, one_line_errors
from hf_seg.settings import Parser
from hf_seg.terminal import print_summary


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the --output_dir of a recipe")
    parser.add_argument("repository", help="user/name on the Hub; created if it is new")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--revision", help="branch, created if it is new; default: main")
    parser.add_argument("--dataset", action="store_true", help="refuse a folder that is not a dataset")
    return parser.parse_args()


def main() -> None:
    """Check, complete, send."""
    args = parse()
    from transformers.utils.logging import disable_progress_bar  # slow imports come after the command line

    from hf_seg.hub.cards import write_model_card
    from hf_seg.hub.push import check_login, find_kind, push

    disable_progress_bar()
    kind = find_kind(args.folder)
    if args.dataset and kind != "dataset":
        raise UserError(f"{args.folder} contains no dataset but {'an' if kind == 'ensemble' else 'a'} {kind}")
    check_login(args.repository)
    if kind != "dataset" and not (args.folder / "README.md").exists():
        write_model_card(args.folder)
        print(f"card: {args.folder / 'README.md'}")
    url = push(args.folder, args.repository, args.private, args.revision)
    print_summary(f"on the Hub: {url}", {"url": url})


if __name__ == "__main__":
    with one_line_errors():
        main()
