"""The losses, one small file each: a dataclass with the formula and a public function."""
