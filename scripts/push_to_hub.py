"""Send a finished output folder to the Hub: a network, an ensemble or a dataset of pseudo-labels; or an app as a Space.

    python scripts/push_to_hub.py runs/stage2_b5 user/name --private
    python scripts/push_to_hub.py runs/stage2_b5/best user/name --revision best
    python scripts/push_to_hub.py runs/labels user/labels
    python scripts/push_to_hub.py space user/app --model user/name

First the folder is checked: every file exists, weights open, class 0 is background, the files of a dataset have the
checksums in its manifest. Checkpoints, the tracker's files and `best/` are not sent. A folder without a card gets one.
A folder with app.py, and an `sdk` in its README's header, becomes a Space, with this package beside the app; --model
tells it which models to show.
Tiles are pushed by scripts/prepare_data.py. Log in with `hf auth login`, or set HF_TOKEN.
"""

import argparse
from pathlib import Path

from hf_seg.errors import UserError, one_line_errors
from hf_seg.settings import Parser
from hf_seg.terminal import print_summary


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path, help="the --output_dir of a recipe, or the folder of an app")
    parser.add_argument("repository", help="user/name on the Hub; created if it is new")
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.add_argument("--revision", help="branch, created if it is new; default: main")
    parser.add_argument("--dataset", action="store_true", help="refuse a folder that is not a dataset")
    parser.add_argument("--model", nargs="+", default=[], help="of a Space: Hub ids of the models that it shows")
    return parser.parse_args()


def main() -> None:
    """Check, complete, send."""
    args = parse()
    from transformers.utils.logging import disable_progress_bar  # slow imports come after the command line

    from hf_seg.hub.cards import write_model_card
    from hf_seg.hub.push import check_login, find_kind, push
    from hf_seg.hub.push_space import is_space
    from hf_seg.locks import exclusive

    disable_progress_bar()
    if is_space(args.folder):
        send_space(args)
        return
    if args.model:
        raise UserError(f"--model is of a Space, but {args.folder} contains no app.py with an sdk in its README.md")
    kind = find_kind(args.folder)
    if args.dataset and kind != "dataset":
        raise UserError(f"{args.folder} contains no dataset but {'an' if kind == 'ensemble' else 'a'} {kind}")
    check_login(args.repository)
    with exclusive(args.folder, hint="push another folder"):
        if kind != "dataset" and not (args.folder / "README.md").exists():
            write_model_card(args.folder)
            print(f"card: {args.folder / 'README.md'}")
        url = push(args.folder, args.repository, args.private, args.revision)
    print_summary(f"on the Hub: {url}", {"url": url})


def send_space(args: argparse.Namespace) -> None:
    """Send an app as a Space."""
    from hf_seg.hub.push import check_login
    from hf_seg.hub.push_space import push_space

    if args.revision or args.dataset:
        raise UserError("a Space runs its main branch: omit --revision and --dataset")
    check_login(args.repository)
    url, needs_token = push_space(args.folder, args.repository, args.model, private=args.private)
    note = "a model is private: give the Space a secret HF_TOKEN that may read it, in its settings"
    print_summary(f"on the Hub: {url}" + (f"\n{note}" if needs_token else ""), {"url": url, "needs_token": needs_token})


if __name__ == "__main__":
    with one_line_errors():
        main()
