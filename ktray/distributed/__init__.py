"""Everything that touches Ray: connection, allocation, Ray Data, watchdog, checks before a job."""
