"""groupsae and the libraries beside it, trained on the same work in turns: see README.md."""
