"""The embedded tiny world: 64x64 images, three tasks, a real SD3 pipeline that two CPU cores can train."""
