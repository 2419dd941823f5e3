"""Where the project lies: the folder of src/ and conf/, from which a clone or an installed copy runs."""

from __future__ import annotations

from pathlib import Path

PROJECT = Path(__file__).resolve().parents[2]
CONF = PROJECT / "conf"
