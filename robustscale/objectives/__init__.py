"""Training objectives. One paper a file, one frozen dataclass each; found by walking this package."""
