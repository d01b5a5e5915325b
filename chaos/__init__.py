"""A bounded, seeded run of everything that can go wrong at once, and what must hold all the same: scripts/chaos."""
