"""The ledger of costs, prices, energy, devices."""
