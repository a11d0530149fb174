"""What fits this package into other libraries; the public names are in `qwen3_vl.integrations`."""
