"""Upload an export to the HuggingFace hub, with a model card of what was trained and measured.

lljax push --workdir=runs/quickstart --repo=me/my-model --dry_run    # writes the card
lljax push --workdir=runs/quickstart --repo=me/my-model --private
lljax push --workdir=runs/quickstart --format=merged --repo=me/my-model --license=apache-2.0
lljax push --export=exports/qwen-gptq --repo=me/my-model               # an export without a run
"""

from collections.abc import Sequence
from pathlib import Path

from lljax.cli.arguments import parser
from lljax.errors import exit_cleanly


def main(argv: Sequence[str]) -> None:
    """Writes the card into the export, lists the files, and uploads them unless --dry_run."""
    command = parser("push", __doc__)
    command.add_argument("--repo", required=True, help="OWNER/NAME, made if it is not there")
    command.add_argument("--workdir", type=Path, help="the run, for the card")
    command.add_argument("--format", help="which export of the run: peft (default), merged ...")
    command.add_argument(
        "--export", type=Path, help="folder of the export; by default WORKDIR/export/FORMAT"
    )
    command.add_argument("--private", action="store_true", help="the repository must be private")
    command.add_argument("--revision", help="branch, made if it is not there; by default main")
    command.add_argument("--message", help="of the commit")
    command.add_argument(
        "--license", help="the hub's id of it, as apache-2.0; by default the license of the base"
    )
    command.add_argument(
        "--base_model", help="the base's hub id, if it was read from a folder or a file"
    )
    command.add_argument(
        "--overwrite_card", action="store_true", help="also a README.md that was edited"
    )
    command.add_argument(
        "--dry_run", action="store_true", help="write the card and list the files, no network"
    )
    arguments = command.parse_args(argv)
    with exit_cleanly():
        from lljax.cli.upload import push  # imported here: --help is quick

        push(arguments)
