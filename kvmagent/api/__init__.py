"""HTTP: what comes in is checked here, what goes out is written here.

wire      JSON and headers to typed requests, errors to JSON; the only user of simplejson
server    routes, made from the declared commands; the only user of CherryPy
openapi   the same declarations as an OpenAPI document
"""
