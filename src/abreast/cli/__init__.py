"""The command line."""

from abreast.cli.main import main as main
