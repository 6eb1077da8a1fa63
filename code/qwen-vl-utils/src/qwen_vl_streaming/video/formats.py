"""What FFmpeg may open: formats that hold a film, and protocols that bring one. It knows many more, and some of their
files only name others, on this machine or elsewhere: playlists, lists of pictures, descriptions of a session."""

FILMS = (
    "mov,matroska,avi,mpegts,mpeg,mpegvideo,flv,live_flv,kux,asf,ogg,gif,apng,mxf,gxf,lxf,nut,ivf,dv,rm,wtv,swf,dhav,"
    "ty,nsv,nuv,film_cpk,roq,smk,bink,flic,4xm,cine,pva,yuv4mpegpipe,h261,h263,h264,hevc,vvc,evc,m4v,obu,vc1,vc1test,"
    "dirac,cavsvideo,mjpeg,mjpeg_2000"
)
SOUND = "mp3,wav,flac,aac,ac3,eac3"
"""Without a picture, which is said better later on; and in the playlists of streams."""
FILE = {"format_whitelist": f"{FILMS},{SOUND}", "protocol_whitelist": "file"}
"""Options with which a file is opened."""
SCHEMES = ("rtsp", "rtsps", "http", "https", "rtmp", "rtmps", "rtmpt", "srt", "udp", "tcp", "rtp")
"""Of addresses of streams."""
STREAM = {
    "format_whitelist": f"{FILE['format_whitelist']},mpjpeg,hls,dash,rtsp,rtp,sdp,webvtt",
    "protocol_whitelist": ",".join(
        (*SCHEMES, "tls", "httpproxy", "crypto", "data", "hls", "rtmpe", "rtmpte", "rtmpts")
    ),
}
"""Options with which an address is opened: nothing in it leads to a file."""
