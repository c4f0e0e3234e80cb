"""What the scripts share, in rooms; docs/architecture.md has a drawing of them."""
