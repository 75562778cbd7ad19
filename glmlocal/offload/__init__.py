"""Expert tiers: where experts live when they do not all fit in memory. Nothing is offloaded yet: all are resident."""
