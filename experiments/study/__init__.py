"""What only studies need: what a plan or a measurement computes, and how it is shown."""
