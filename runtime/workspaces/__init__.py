"""The buffers of calls of CPU engines, operator by operator, for `runtime.arena`; a file for each graph."""
