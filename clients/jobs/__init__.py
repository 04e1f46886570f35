"""Jobs: volumes segmented block by block, resumed after any kill, and certified."""
