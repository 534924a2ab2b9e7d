"""Whole machines saved, cloned and rewound (docs/snapshots.md)."""
