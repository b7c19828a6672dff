"""One decoder per engine; each fits `runtime.decoder.Decoder`."""
