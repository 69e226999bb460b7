// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.37;

import {Channels} from "../src/Channels.sol";
import {TestToken} from "../src/TestToken.sol";
import {Vault} from "../src/Vault.sol";
import {Workers} from "../src/Workers.sol";
import {IChannels} from "../src/interfaces/IChannels.sol";
import {Lite} from "./Lite.sol";

/// @dev A sealed market in which the payer has PURSE in the vault.
abstract contract Fixture is Lite {
    uint256 internal constant PAYER = 0xA11CE;
    uint256 internal constant SESSION = 0x5E55;
    uint256 internal constant WORKER = 0x30B;
    uint256 internal constant MALLORY = 0xBAD;
    uint40 internal constant FOREVER = type(uint40).max;
    uint128 internal constant PURSE = 1_000_000;

    Vault internal vault;
    Workers internal workers;
    Channels internal channels;
    TestToken internal token;
    IChannels.ChannelConfig internal config;
    bytes32 internal id;

    function setUp() public virtual {
        vm.warp(1_800_000_000);
        vault = new Vault(address(this), 0);
        workers = new Workers(vault);
        channels = new Channels(vault, workers);
        token = new TestToken();
        address[] memory modules = new address[](2);
        (modules[0], modules[1]) = (address(channels), address(workers));
        vault.seal(modules);
        vault.setToken(address(token), true);
        vault.setToken(address(0), true);
        token.mint(address(this), PURSE);
        token.approve(address(vault), PURSE);
        vault.deposit(address(token), PURSE, vm.addr(PAYER));
        config = IChannels.ChannelConfig({
            payer: vm.addr(PAYER),
            payerAuthorizer: vm.addr(SESSION),
            receiver: vm.addr(WORKER),
            receiverAuthorizer: vm.addr(WORKER),
            token: address(token),
            withdrawDelay: 15 minutes,
            salt: 0
        });
        id = channels.channelIdOf(config);
    }

    function allocate(uint128 amount) internal {
        channels.allocate(config, amount, FOREVER, signed(PAYER, channels.allocationDigest(id, amount, FOREVER)));
    }

    function entry(uint128 amount, uint128 ceiling, uint256 key) internal view returns (IChannels.ClaimEntry memory) {
        return IChannels.ClaimEntry(config, amount, ceiling, signed(key, channels.voucherDigest(id, ceiling)));
    }

    function claim(uint128 amount, uint128 ceiling, uint256 key) internal returns (uint256) {
        IChannels.ClaimEntry[] memory entries = new IChannels.ClaimEntry[](1);
        entries[0] = entry(amount, ceiling, key);
        return channels.claim(entries);
    }

    function balance(address account) internal view returns (uint256) {
        return vault.balanceOf(address(token), account);
    }
}
