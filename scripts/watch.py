"""Show runs in TensorBoard while they train, also those that begin later: see `watch.py --help`."""
import argparse
import os
import shlex
import sys
import tempfile
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import vit_helpers  # noqa: E402

EPILOG = """\
RUNS are names or patterns, such as "sweep-*" or "published/**" (`make runs` lists the runs); left
out, they are all but the published ones. TensorBoard reads one folder and all that is in it, so it
is given a temporary one of links to these runs, which is renewed every few seconds.
"""
EVERY = 3               # seconds from one look for new runs to the next


def chosen(patterns):
    """{name: folder} of the runs that fit one of the patterns or, if there are none, of one's own;
    a name is a path below runs/."""
    found = {}
    for folder in vit_helpers.run_folders(patterns or ["**"]):
        name = vit_helpers.bare_name(folder)
        if patterns or name.split("/")[0] != "published":
            found[name] = folder.resolve()
    return found


def renew_links(place, patterns):
    """Let the folder `place` hold links to the chosen runs, each under its name, which is that in
    TensorBoard; returns the runs."""
    runs = chosen(patterns)
    for root, folders, files in os.walk(place):
        for link in (Path(root, name) for name in folders + files):
            if link.is_symlink() and str(link.relative_to(place)) not in runs:
                link.unlink()
    for name, folder in runs.items():
        link = place / name
        if not link.exists():                   # it does, too, below the link of a run around it
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(folder)
    return runs


def keep_renewing(place, patterns, ended):
    """Renew the links until the event `ended` is set."""
    while not ended.wait(EVERY):
        try:
            renew_links(place, patterns)
        except OSError as error:                # a run that is just being moved: look again
            print(f"tensorboard: {error}", file=sys.stderr)


def watch(patterns, options):
    """Run TensorBoard on the chosen runs until it is stopped."""
    from tensorboard.main import run_main
    with tempfile.TemporaryDirectory(prefix="vit-tensorboard-") as folder:
        runs, ended = renew_links(Path(folder), patterns), threading.Event()
        which = " ".join(patterns) or "all but the published ones"
        print(f"{len(runs)} of the runs in {vit_helpers.RUNS}: {which}; new ones appear as they "
              "begin", flush=True)
        renewing = threading.Thread(target=keep_renewing, args=(Path(folder), patterns, ended),
                                    daemon=True)
        renewing.start()
        sys.argv = ["tensorboard", "--logdir", folder, "--host", "localhost", *options]
        try:
            run_main()
        finally:
            ended.set()
            renewing.join()                     # before the folder of links is deleted


def main(arguments=None):
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog="watch.py", description="Show runs in TensorBoard, on this machine only.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("runs", metavar="RUNS", nargs="*", help="names or patterns of runs")
    add("--options", default="", metavar="TEXT", help="TensorBoard's own: --options='--port 6007'")
    typed = parser.parse_args(arguments)
    watch(" ".join(typed.runs).split(), shlex.split(typed.options))


if __name__ == "__main__":
    main()
