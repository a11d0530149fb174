"""Many sequences on one session: queue, scheduler, KV slots, caches, and the thread that runs the steps."""
