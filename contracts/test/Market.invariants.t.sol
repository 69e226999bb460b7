// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Channels} from "../src/Channels.sol";
import {Vault} from "../src/Vault.sol";
import {IChannels} from "../src/interfaces/IChannels.sol";
import {Fixture} from "./Fixture.sol";
import {Lite} from "./Lite.sol";

/// @dev An attacker: any amount, right and wrong keys, six channels of one payer and one receiver.
contract Handler is Lite {
    Channels public immutable channels;
    Vault public immutable vault;
    uint256 private immutable _payer;
    uint256 private immutable _session;
    uint256 private immutable _worker;
    IChannels.ChannelConfig[] private _configs;
    mapping(bytes32 id => uint128) public highestSigned;
    mapping(bytes32 id => uint40) public begun;
    bool public earlyEnd;

    constructor(
        Channels channels_,
        Vault vault_,
        uint256 payer,
        uint256 session,
        uint256 worker,
        IChannels.ChannelConfig[] memory configs
    ) {
        (channels, vault, _payer, _session, _worker) = (channels_, vault_, payer, session, worker);
        for (uint256 i = 0; i < configs.length; ++i) {
            _configs.push(configs[i]);
        }
    }

    function ids() public view returns (bytes32[] memory found) {
        found = new bytes32[](_configs.length);
        for (uint256 i = 0; i < found.length; ++i) {
            found[i] = channels.channelIdOf(_configs[i]);
        }
    }

    function allocate(uint256 pick, uint128 amount, uint256 flaw) external {
        IChannels.ChannelConfig memory config = _pick(pick);
        bytes32 id = channels.channelIdOf(config);
        uint128 now_ = channels.channel(id).allocated;
        amount = uint128(within(amount, now_, uint256(now_) + (flaw % 4 == 0 ? 2_000_000 : 50_000)));
        bytes32 digest = channels.allocationDigest(id, amount, type(uint40).max);
        channels.allocate(config, amount, type(uint40).max, signed(flaw % 4 == 1 ? _session : _payer, digest));
    }

    function claim(uint256 pick, uint128 amount, uint128 ceiling, uint256 flaw) external {
        IChannels.ClaimEntry[] memory entries = new IChannels.ClaimEntry[](1);
        IChannels.ChannelConfig memory config = _pick(pick);
        bytes32 id = channels.channelIdOf(config);
        uint128 top = channels.channel(id).allocated;
        (amount, ceiling) = (uint128(within(amount, 0, uint256(top) + 2)), uint128(within(ceiling, 0, uint256(top) + 2)));
        bytes32 about = flaw % 5 == 0 ? channels.channelIdOf(_pick(pick + 1)) : id;
        uint256 key = flaw % 5 == 1 ? _worker : _session;
        if (key == _session && ceiling > highestSigned[about]) highestSigned[about] = ceiling;
        entries[0] = IChannels.ClaimEntry(config, amount, ceiling, signed(key, channels.voucherDigest(about, ceiling)));
        channels.claim(entries);
    }

    function settle(uint256 pick) external {
        IChannels.ChannelConfig memory config = _pick(pick);
        channels.settle(config.receiver, config.token);
    }

    function initiate(uint256 pick, uint256 flaw) external {
        IChannels.ChannelConfig memory config = _pick(pick);
        vm.prank(flaw % 4 == 0 ? config.receiver : config.payer);
        channels.initiateWithdraw(config);
        begun[channels.channelIdOf(config)] = uint40(block.timestamp);
    }

    function finalize(uint256 pick, uint256 waited) external {
        IChannels.ChannelConfig memory config = _pick(pick);
        bytes32 id = channels.channelIdOf(config);
        vm.warp(block.timestamp + waited % 20 minutes);
        channels.finalizeWithdraw(config);
        if (begun[id] == 0 || block.timestamp < begun[id] + config.withdrawDelay) earlyEnd = true;
    }

    function close(uint256 pick, uint128 amount, uint128 voucher, uint256 flaw) external {
        IChannels.ChannelConfig memory config = _pick(pick);
        bytes32 id = channels.channelIdOf(config);
        uint128 top = channels.channel(id).allocated;
        (amount, voucher) = (uint128(within(amount, 0, uint256(top) + 2)), uint128(within(voucher, 0, uint256(top) + 2)));
        if (voucher > highestSigned[id]) highestSigned[id] = voucher;
        bytes memory voucherProof = signed(_session, channels.voucherDigest(id, voucher));
        bytes memory closeProof = signed(flaw % 2 == 0 ? _payer : _worker, channels.closeDigest(id, amount));
        channels.close(config, amount, voucher, voucherProof, closeProof);
    }

    function _pick(uint256 pick) private view returns (IChannels.ChannelConfig memory) {
        return _configs[pick % _configs.length];
    }
}

contract MarketInvariants is Fixture {
    Handler private handler;

    function setUp() public override {
        super.setUp();
        IChannels.ChannelConfig[] memory configs = new IChannels.ChannelConfig[](6);
        for (uint256 i = 0; i < configs.length; ++i) {
            config.salt = bytes32(i);
            configs[i] = config;
        }
        handler = new Handler(channels, vault, PAYER, SESSION, WORKER, configs);
        target(address(handler));
    }

    /// @dev I1: what the vault owes is balances plus locks, and it has the coins.
    function invariant_theLedgerIsWhole() public view {
        uint256 locked = vault.lockedBy(address(channels), address(token));
        uint256 owed = channels.owed(config.receiver, address(token));
        uint256 remainders;
        bytes32[] memory ids = handler.ids();
        for (uint256 i = 0; i < ids.length; ++i) {
            IChannels.Channel memory c = channels.channel(ids[i]);
            remainders += c.allocated - c.claimed;
        }
        same(locked, remainders + owed, "locks");
        same(vault.liabilities(address(token)), balance(config.payer) + balance(config.receiver) + locked, "liabilities");
        require(token.balanceOf(address(vault)) >= vault.liabilities(address(token)), "coins");
    }

    /// @dev I2, I4: claimed stays under what was allocated and under what the session key signed for that channel.
    function invariant_claimsAreSignedAndCovered() public view {
        bytes32[] memory ids = handler.ids();
        for (uint256 i = 0; i < ids.length; ++i) {
            IChannels.Channel memory c = channels.channel(ids[i]);
            require(c.claimed <= c.allocated, "I2");
            require(c.claimed <= handler.highestSigned(ids[i]), "I4");
        }
    }

    /// @dev I5
    function invariant_noWithdrawalEndsEarly() public view {
        require(!handler.earlyEnd(), "I5");
    }
}
