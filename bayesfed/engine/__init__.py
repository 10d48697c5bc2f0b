"""Engines: how messages reach clients. Each runs the same ServerApp and ClientApp, to the same bits."""
