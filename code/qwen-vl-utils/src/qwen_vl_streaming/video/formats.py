"""Formats and protocols that FFmpeg may open. FFmpeg supports many more. Some of them, such as playlists, image lists
and session descriptions, only refer to other files, on this machine or on the network, and are not allowed for
files."""

FILMS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,live_flv,kux,asf,ogg,gif,apng,mxf,gxf,lxf,nut,ivf,dv,rm,wtv,swf,dhav,"
    "ty,nsv,nuv,film_cpk,roq,smk,bink,flic,4xm,cine,pva,yuv4mpegpipe,h261,h263,h264,hevc,vvc,evc,m4v,obu,vc1,vc1test,"
    "dirac,cavsvideo,mjpeg,mjpeg_2000"
)
SOUND = "mp3,wav,flac,aac,ac3,eac3"
"""Audio formats. A file without video opens, so that a later check can report it clearly. Playlists of streams also use
them."""
FILE = {"format_whitelist": f"{FILMS},{SOUND}", "protocol_whitelist": "file"}
"""FFmpeg options for opening a file."""
SCHEMES = ("rtsp", "rtsps", "http", "https", "rtmp", "rtmps", "rtmpt", "srt", "udp", "tcp", "rtp")
"""URL schemes of streams."""
STREAM = {
    "format_whitelist": f"{FILE['format_whitelist']},mpjpeg,hls,dash,rtsp,rtp,sdp,webvtt",
    "protocol_whitelist": ",".join(
        (*SCHEMES, "tls", "httpproxy", "crypto", "data", "hls", "rtmpe", "rtmpte", "rtmpts")
    ),
}
"""FFmpeg options for opening a URL. The `file` protocol is not allowed, so a playlist cannot open a local file."""
