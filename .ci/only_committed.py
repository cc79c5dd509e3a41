"""Refuses to make a source distribution of a checkout with files that are not committed."""

import subprocess
from pathlib import Path

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class OnlyCommitted(BuildHookInterface):
    """Called by hatchling before it collects files."""

    def initialize(self, version, build_data):
        """Raise where git knows of changes; a tree without git is somebody's source distribution already."""
        del version, build_data
        if not (Path(self.root) / ".git").exists():
            return
        command = ["git", "-C", self.root, "status", "--porcelain", "--untracked-files=all"]
        changes = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        if changes:
            raise RuntimeError(f"commit these, or remove them; they would be in the source distribution:\n{changes}")
