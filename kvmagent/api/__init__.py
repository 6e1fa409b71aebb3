"""HTTP: checks what comes in and writes what goes out.

listener  sockets, TLS, slow clients; the only user of cheroot
framing   whether a request is whole, how large it may be, and what its head says
security  who a client is, and whether it may come in
server    routes, made from the declared commands; the only user of CherryPy
wire      JSON and headers to typed requests, errors to JSON; the only user of simplejson
intake    a command in: checked, stored, and only then accepted
resources the GET paths; deadline is how long they wait for libvirt
openapi   the same declarations as an OpenAPI document
"""
