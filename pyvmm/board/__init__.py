"""The board that devices are plugged into: buses, slots, and what is in them."""
