"""DeepSeek's serving cluster over a day: the real scheduler, pages and router, driven by modelled times of steps."""
