"""`kvmagentctl`: the operator's tool, a client of the agent's HTTP API, and a doctor for the host.

    main      the command line: subcommands, exit status, errors in one line
    declared  a subcommand from each declared Command
    agent     one agent: GET and POST      callbacks  where the agent posts outcomes      errand  a task until its end
    views     what people read of it       terminal   tables, colour, progress            doctor  checks of the host

The agent's process imports none of this.
"""
