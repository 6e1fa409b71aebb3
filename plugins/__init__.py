"""The plugins that ship with the agent, installed as the package kvmagent_plugins."""
