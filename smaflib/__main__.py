"""``python -m smaflib`` is ``smaf``."""

from smaflib.apps.cli import app

app(prog_name="smaf")
