"""What several test files use; import it as `from helpers.<file> import <name>`."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PICTURES = ROOT / "qwen3vl_export" / "demo" / "images"
