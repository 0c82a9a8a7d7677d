"""Is there a Chromium for the tests of `orrery play`? Installs one where it can.

Standard library only. One line says what was found or done; the exit code is always 0, because nothing but those tests
needs a browser here: without one they are skipped.
"""

import os
import shutil
import subprocess
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PACKAGE = "chromium"


def browser() -> str | None:
    """The first of these that is there and starts (Ubuntu's `chromium-browser` without snap does not)."""
    for path in filter(None, map(shutil.which, NAMES)):
        try:
            started = subprocess.run([path, "--version"], capture_output=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if started.returncode == 0:
            return path
    return None


def main() -> int:
    if found := browser():
        print(f"browser for the tests: {found}")
        return 0
    if sys.platform != "linux" or os.geteuid() != 0 or shutil.which("apt-get") is None:
        print(
            "no Chromium found: the tests of the page of `orrery play` are skipped (Debian: apt-get install chromium)"
        )
        return 0
    print(f"no Chromium found: installing {PACKAGE}", flush=True)
    environment = dict(os.environ, DEBIAN_FRONTEND="noninteractive")
    install = ["apt-get", "install", "-qq", "-y", "--no-install-recommends", PACKAGE]
    for command in (["apt-get", "update", "-qq"], install):
        subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=False)
    if browser() is None:
        print("apt-get could not install chromium: the tests of the page of `orrery play` are skipped")
    return 0


if __name__ == "__main__":
    sys.exit(main())
