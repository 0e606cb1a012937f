"""Other projects' trainers beside ours, from checkouts of theirs; see README.md here."""
