"""One address for many servers of prefill and decode."""
