"""`kvmagentctl`: the operator's tool, a client of the agent's HTTP API, and a doctor for the host.

    main      the command line: subcommands, exit status, errors in one line; options of all of them: session
    changes   the subcommands that send a command, each from its declaration (declared)
    reads     those that change nothing; doctor with hostchecks, certificates and findings; pki issues certificates
    submit    a task until its end, over agent (GET and POST of one agent)
    views     what people read of it; terminal: tables, colour, progress

The agent's process imports none of this.
"""
