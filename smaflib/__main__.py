"""``python -m smaflib`` is ``smaf``."""

from smaflib.apps.cli import app

if __name__ == "__main__":
    app(prog_name="smaf")
