"""The Debian package: what is in it, its life on a clean machine, and its roll-out by Ansible."""
