"""The built-in model: how its data is made, how it is trained, measured and exported."""
